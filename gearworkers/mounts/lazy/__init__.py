"""The lazy file system: a FUSE layer behind public/ that fetches what is looked up.

protocol     requests and answers of /dev/fuse as bytes
connection   reads requests, sends answers, hands on what is interrupted
tree         what a request means: the trap for objects, served files for large ones
keeper       holds the connection's descriptor while no server lives
"""
