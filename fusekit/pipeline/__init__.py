"""From a recipe to a merged model: stages that leave artifacts, and do nothing where those are there already.

:func:`fusekit.pipeline.run.run` does what is missing of a recipe.
"""
