"""`python -m fadc_timm`: the command line."""
from .cli import main

raise SystemExit(main())
