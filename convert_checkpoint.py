"""Puts a published CALM and its autoencoder into one repository: `python convert_checkpoint.py --help`."""

import sys

from calm_transformers.conversion.convert import main

if __name__ == "__main__":
    sys.exit(main())
