"""The version; the top entry of CHANGELOG.md names the same one."""

__version__ = "0.6.0"
