"""`python -m scionlm` (and so `torchrun -m scionlm`) is the command `scion`."""

from scionlm.cli.main import main

if __name__ == "__main__":
    main()
