"""Building blocks of the project's HTTP services; they know nothing of objects or remotes.

`tokens` checks bearer tokens, `tls` loads and renews a certificate, `pacing` moves bodies at the client's pace and
drops slow clients, `limits` bounds connections and headers.
"""
