"""The GPU decode path: a persistent Pallas:Mosaic GPU kernel for a whole token (``api``)."""
