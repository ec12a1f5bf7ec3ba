"""`jcdp demo`: a page on which to drop pictures, to protect or purify them, and to see what changed."""
