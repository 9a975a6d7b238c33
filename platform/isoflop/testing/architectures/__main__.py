"""``python -m isoflop.testing.architectures [--write] [llama …]``: walk, and print the page or write it anew."""

from isoflop.testing.architectures.page import main

raise SystemExit(main())
