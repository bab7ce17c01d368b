"""Building blocks of the project's HTTP services; they do not depend on objects or remotes.

`tokens` checks bearer tokens, `tls` loads and renews a certificate, `pacing` moves bodies at the client's pace and
drops slow clients, `limits` bounds connections and headers.
"""
