"""How the pages here become a site: `make docs`. Warnings are errors there, so that no link is broken."""

project = "bitatlas"
author = copyright = "The bitatlas authors"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "bitatlas"
html_show_sourcelink = False
exclude_patterns = ["_build"]
nitpicky = True
myst_heading_anchors = 3
myst_links_external_new_tab = True
suppress_warnings = ["misc.highlighting_failure", "toc.not_included"]  # commands without a language; pages that are linked alone
