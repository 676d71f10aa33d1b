"""`python -m gspo_dist` is `gspo`."""

from gspo_dist.cli.main import main

main()
