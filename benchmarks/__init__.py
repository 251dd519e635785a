"""Speed and memory of MobileMamba beside its peers; see README.md for what is fair about it."""
