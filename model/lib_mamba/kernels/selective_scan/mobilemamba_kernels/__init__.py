"""The compiled scans of MobileMamba: a library of operators, found and loaded by `model.lib_mamba.compiled`."""
