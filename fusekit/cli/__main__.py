"""``python -m fusekit.cli``: for launchers that start a module (``accelerate launch -m``, ``torchrun -m``)."""

from fusekit.cli import main

if __name__ == "__main__":
    main()
