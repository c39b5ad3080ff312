"""`python -m lm_saes` is `lm-saes`."""

from lm_saes.cli import main

main()
