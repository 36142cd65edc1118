"""``python -m headstart.cli``, which is how ``torchrun -m`` starts the command line."""

from headstart.cli.app import main

if __name__ == "__main__":
    main()
