"""The version of edgestill, alone, so that setuptools, the doctor and the package itself read one line."""

__version__ = "0.1.0"
