"""What a user brings to a run, each in a short file that runs as it stands.

    squared.py       an objective of one's own
    digit_reward.py  a reward of one's own, with parts
    make_sums.py     a data file of one's own, as texts or as chat messages

Copy one into your own folder and change it there. Each docstring gives a command, and tests run all files.
"""
