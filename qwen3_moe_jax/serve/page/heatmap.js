// Experts by layer as a picture: one pixel for each, light where many tokens chose it.

export function draw(canvas, counts) {
  const layers = counts.length, experts = counts[0].length;
  canvas.width = experts;
  canvas.height = layers;
  const context = canvas.getContext("2d"), picture = context.createImageData(experts, layers);
  counts.forEach((row, y) => {
    const most = Math.max(1, ...row);
    row.forEach((count, x) => {
      const share = Math.sqrt(count / most), at = 4 * (y * experts + x);
      picture.data.set([30 + 225 * share, 30 + 150 * share * share, 70 + 60 * (1 - share), 255], at);
    });
  });
  context.putImageData(picture, 0, 0);
}
