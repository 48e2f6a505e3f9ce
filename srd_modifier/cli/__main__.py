"""`python -m srd_modifier.cli`, which `torchrun -m` starts."""

from srd_modifier.cli import main

if __name__ == "__main__":
    main()
