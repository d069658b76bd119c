"""Scripts that time other engines on the same weights and inputs. They run by path, with plain libraries: the
interpreter of a peer need not have the adapter's packages. Only peer.py is imported from here."""
