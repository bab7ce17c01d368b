"""Start-up profiles: the objects that a container reads while it starts, recorded once and then prefetched.

`hooks` is called when layers are applied and containers are mounted. `recordings` starts a `recorder` process for the
first start of an image; the recorder watches opens by `fanotify`, finds their objects by `resolve`, and saves the
`document` in the remote. In the lazy file server, `prefetch` looks for profiles and fetches their objects, and `growth`
adds objects that a profile lacks.
"""
