"""Read and write tar streams; no file system, no network.

`reader` turns bytes into entries (`header`, `pax`, `sparse`), `writer` turns entries into bytes, and `tar_split` stores
everything except the contents, so that the exact bytes can be reproduced.
"""
