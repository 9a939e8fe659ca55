"""`python -m avtrain`, and `torchrun -m avtrain`."""

from avtrain.cli import main

if __name__ == "__main__":
    main(prog_name="avtrain")
