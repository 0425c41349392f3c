"""Words that both ends share: topics, messages, sampling policy and the binary codec.

Both ends import these modules and nothing here imports either end, so device and edge cannot drift
apart in what they mean.
"""
