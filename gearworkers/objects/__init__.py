"""Objects: one immutable file per distinct content, and what keeps, checks and moves them."""
