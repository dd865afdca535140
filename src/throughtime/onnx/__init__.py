"""ONNX, both ways: layers as its LSTM, GRU and RNN nodes, such nodes as layers, and whole models written and checked."""
