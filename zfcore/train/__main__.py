import sys

from zfcore.train.command import main

sys.exit(main())
