"""One token of each of many sequences through a decoder layer, in few launches."""
