"""Ends a program in one line where Python is too old. Imported first; this file itself parses on any Python 3."""

import sys

if sys.version_info < (3, 10):
    sys.stderr.write("error: this is Python %d.%d, and 3.10 or later is needed; install that\n" % sys.version_info[:2])
    sys.exit(2)
