"""Claims of papers, in miniature: each is declared as data, measured over seeds, and judged.

``lightning-decentral reproduce NAME`` runs one; see `command`.
"""
