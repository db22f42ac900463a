"""Tensors as Flower arrays: conversion, selection, compression and averages."""
