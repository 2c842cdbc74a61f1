"""What a run was: one page that needs nothing else, and the card of the merged model.

:func:`fusekit.report.write.write_report` makes both from the artifacts of a run, finished or not.
"""
