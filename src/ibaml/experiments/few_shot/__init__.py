"""Table 1 and Fig. 3: accuracy, nll and calibration on few-shot image classification."""
