import sys

if not getattr(sys.flags, "safe_path", False):
    # The current folder, which python -m puts first: a random.py or torch.py in it is not what the library means.
    # Models are found in it all the same, as with the console command.
    sys.path.append(sys.path.pop(0))

from zfcore.cli import main

sys.exit(main())
