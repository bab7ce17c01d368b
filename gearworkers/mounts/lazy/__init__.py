"""The lazy file system: a FUSE layer behind public/ that fetches what is looked up.

protocol     requests and answers of /dev/fuse as bytes
connection   reads requests, sends answers, gives up those of killed processes
tree         what a request means: the trap for objects, served files for large ones
openings     which large files are read past the server
keeper       holds the connection's descriptor while no server lives
place        where the file system is mounted, and which overlays look into it
trial        what this kernel's FUSE offers
client       what other processes ask of the server, over its control socket
"""
