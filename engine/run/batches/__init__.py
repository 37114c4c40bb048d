"""A run's requests in batches: a call that takes hours, and outlives the process that made it.

route     what goes in a batch, what goes live, and when
desk      what all parts share: provider, store, budget, settings
order     a batch from its requests to the provider's yes
collect   from the provider's files to answers in the store
bulk      the tasks, one a batch, from wherever an earlier session left it
"""
