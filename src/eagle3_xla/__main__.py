import sys

from eagle3_xla.cli import main

sys.exit(main())
