"""The `avtrain` command for tests of several processes: up to half of the clips may be unreadable."""

from avtrain.cli import main
from avtrain.data import loader

if __name__ == "__main__":
    loader.MOST_UNREADABLE = 0.5
    main(prog_name="avtrain")
