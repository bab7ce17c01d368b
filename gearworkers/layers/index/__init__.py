"""Layer indexes: the tree of a layer as an EROFS image whose files are redirects into the object store.

`tree` builds the tree from tar entries, `erofs` writes the image, `erofs_label` verifies it, `inode_numbers` keeps
inode numbers unique, `mount` mounts an image.
"""
