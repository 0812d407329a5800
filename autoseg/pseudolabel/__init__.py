"""Completing partial labels between two rounds of training: predict, judge, fill in, tell what was done.

rounds     which cases train in which round
evidence   what the previous round's models say about a case, and how sure they are
judge      what of it is accepted
complete   the label that the next round learns from
audit      what became of it all, the most suspicious first
build      the stage: all of it over all cases, resumable by case
"""
