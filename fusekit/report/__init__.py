"""The report of a run as one page that needs nothing else, the card of its merged model, and the page of an alignment.

:func:`fusekit.report.card.write_report` makes the first two from the artifacts of a run, finished or not.
"""
