"""``python -m ggl_audit`` is the same program as ``ggl-audit``."""

from ggl_audit.cli import main

if __name__ == "__main__":
    main()
