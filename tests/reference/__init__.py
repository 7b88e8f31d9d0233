"""Slow plain versions of the methods: loops and float64, written for reading; tests compare against them."""
