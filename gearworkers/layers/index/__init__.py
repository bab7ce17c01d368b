"""Layer indexes: a layer's tree as an EROFS image whose files are redirects into the object store."""
