"""The `gear` command: a module for each of its commands, with its parser and its action.

Each of these modules has a function `command` (or one function per subcommand) whose parameters are the command's
arguments and whose docstring is its help. `main` assembles them. Modules that only some commands need and that take
long to import (Celery, Redis, aiohttp) are imported inside functions.
"""
