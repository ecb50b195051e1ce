"""What the site adds to Sphinx: pages that are made from the code, and formulas without JavaScript."""
