"""Judges: what kind of response is this, and is it correct?"""
