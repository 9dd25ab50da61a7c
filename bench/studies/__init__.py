"""The paper's studies (arXiv 2507.11851) and the options' worth, on the demo model: `python -m bench.studies NAME`."""
