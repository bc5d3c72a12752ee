"""`python -m jaxmoe.cli`."""

from jaxmoe.cli import main

main()
