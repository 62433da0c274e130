"""The HTTP front: guards, protocols, endpoints."""
