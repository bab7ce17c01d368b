"""The content-addressed store: one immutable file per distinct content, shared by all layers.

Glossary: an *object* is such a file. A *ref* is a record in the `objects` file of a layer or pin; it keeps an object
from garbage collection. The *push queue* contains the objects that the remote does not have yet.
"""
