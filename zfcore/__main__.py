import sys

from zfcore.cli import main

sys.exit(main())
